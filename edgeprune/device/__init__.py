"""The board and the way to it: `session` talks through `transports`, the agent measures on the board.

targets    the inventory, and what its boards have and lack (`load_target`, `check_target`, `setup_target`)
session    an open connection: push files, run steps, fetch what they made (`open_session`)
agent      runs on the board, with `measure` and the module of `runtimes/`: nothing but stdlib and numpy
embedded   a stand-in board on loopback, behind a real SSH server

Behind them: `facts` and `sources` ask a board about itself in one round trip, `procfs` parses what Linux
says, `job` follows an agent, `results` reads what it wrote, `install` brings the runtime. Nothing is
imported here, so that the heavy parts load only where they are used.
"""
