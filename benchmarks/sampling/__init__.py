"""sample_logits against transformers' chain of operations."""
