"""PCI as a guest sees it: numbers, configuration space, the function contract."""
