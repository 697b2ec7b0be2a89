"""Management of a running daemon: msgpack messages over a unix socket."""
