"""Answer quality of full prefill, reuse and each selector on the same questions, generated or from a file."""
