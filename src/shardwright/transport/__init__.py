"""Moving messages between processes: base protocols, gRPC, in memory."""
