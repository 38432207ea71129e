"""One served volume: what joins the wire, the write path, the registry and the operating system."""
