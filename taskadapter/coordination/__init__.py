"""How nodes agree, through one database, on which of them is active.

`lease` decides and does no I/O; `tokens` and `jobs` hold all SQL; `heartbeat` joins them in threads
of its own. Import the submodules: this package itself imports nothing, to stay cheap.
"""
