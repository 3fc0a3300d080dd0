"""The board and the way to it: `session` talks through `transports`, `agent` measures on the board.

targets    the inventory: which boards there are and what they have (`load_target`, `check_target` ...)
session    an open connection: push files, run steps, fetch results (`open_session`)
agent      copied to the board with `measure` and the runtime's module: stdlib and numpy, nothing else
embedded   a stand-in board on loopback, behind a real SSH server

Nothing is imported here, so that the heavy parts load only where they are used.
"""
