"""aux_cross_entropy and logit_stats on heads: cases, inputs, oracle, baselines."""
