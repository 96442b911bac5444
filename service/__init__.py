"""The laboratory's side: a gRPC service that evaluates its networks on ciphertexts it cannot read."""
