"""Time to first token of full prefill, prefix-cache hit, reuse and blending, in one run after checking outputs."""
