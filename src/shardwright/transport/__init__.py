"""Moving messages between processes: base protocols, gRPC, in memory."""

import os

# gRPC's core writes lines of its own to standard error when a link breaks, which is raised and reported here anyway.
# It takes its level from the environment alone, when `grpc` is first imported: after this line. A level set by the
# user stands.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
