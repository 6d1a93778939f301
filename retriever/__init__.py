"""Text in, ranked chunks out: parse, chunk, embed, index, search. Knows nothing of KV, GPUs or HTTP."""
