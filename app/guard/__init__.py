"""The online guard: does what we serve from blended KV still say what full prefill says?

watch -> compare -> levels: a sampled answer is noted, the same prompt is prefilled in full in the background, and a
collection whose answers differ too often is blended with more recomputation, at the end not at all.
"""
