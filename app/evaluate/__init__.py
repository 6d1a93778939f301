"""Answer quality of full prefill, reuse and each selector on held-out generated questions."""
