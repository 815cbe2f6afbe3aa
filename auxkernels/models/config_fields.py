"""What trainers and servers read of any model's configuration, in the configurations of composites."""

from __future__ import annotations

from transformers import PretrainedConfig

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def describe_as(config: PretrainedConfig, leader: PretrainedConfig, *others: PretrainedConfig) -> None:
    """Sets sizes and token ids to those of the model that leads; positions to the least that any of the models has.

    Vocabulary and token ids that `config` has already stay: a trainer sets them to the tokenizer's. What a model does
    not have (a recurrent one positions, some their heads) is left out.
    """
    of_leader = leader.get_text_config()
    for name in _SIZES:
        if getattr(of_leader, name, None) is not None:
            setattr(config, name, getattr(of_leader, name))
    for name in _TOKENS:
        if getattr(config, name, None) is None:
            setattr(config, name, getattr(of_leader, name, None))
    every = [getattr(one.get_text_config(), "max_position_embeddings", None) for one in (leader, *others)]
    known = [length for length in every if isinstance(length, int)]
    if known:
        config.max_position_embeddings = min(known)
