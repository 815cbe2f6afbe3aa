"""How the time of a call grows with each of its sizes, beside its bytes and its multiplications, and with threads."""
