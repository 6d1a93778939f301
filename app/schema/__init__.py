"""What goes over the wire: allow-lists of request fields, and the shapes of answers."""
