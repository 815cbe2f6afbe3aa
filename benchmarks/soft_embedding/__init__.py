"""soft_embedding: cases, inputs, oracle."""
