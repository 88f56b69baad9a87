"""Pure bytes: protobuf schema, codec, tensor frames."""
