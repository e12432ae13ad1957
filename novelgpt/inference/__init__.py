"""Generation: prefill, caches, packed weights, chat, and the client of an endpoint."""
