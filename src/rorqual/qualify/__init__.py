"""Does a deployment hold up? Load and soak of a server, from outside, over its sockets."""
