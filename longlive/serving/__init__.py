"""Live sessions over a WebSocket: the server, its recordings and the page."""
