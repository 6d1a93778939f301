"""HTTP routes: read the request, call the service, shape the answer. Decisions are made elsewhere."""
