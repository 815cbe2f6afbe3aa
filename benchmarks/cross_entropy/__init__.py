"""aux_cross_entropy and logit_stats on logits: cases, oracle, baselines."""
