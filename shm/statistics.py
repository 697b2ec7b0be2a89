"""How statistics say which of their numbers may fall.

In the frozen dataclass that `statistics()` gives, an int counts up from when the object
was made; one that says how many there are now is annotated as a `Gauge`.
"""

from typing import Annotated

GAUGE = "gauge"
Gauge = Annotated[int, GAUGE]
