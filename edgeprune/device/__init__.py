"""The board and the way to it: `session` talks through `transports`, `agent` measures on the board.

targets    the inventory: which boards there are (`load_target`, `list_targets`)
session    an open connection: push files, run steps, fetch results (`open_session`)
setup      what a board needs before a session (`check_target`, `setup_target`)
agent      the one file copied to the board: stdlib, numpy and the runtime, nothing else
embedded   a stand-in board on loopback, behind a real SSH server

Nothing is imported here, so that the heavy parts load only where they are used.
"""
