"""`PRETRAIN_SCRIPT` of the tests: hands this rank's arguments, environment and output to the server, and waits for it."""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["RANK_SERVER"])
    socket.send_fds(server, [json.dumps([sys.argv, dict(os.environ)]).encode()], [1, 2])
    server.shutdown(socket.SHUT_WR)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
