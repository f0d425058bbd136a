"""Function calls: JavaScript in QuickJS and Python in WebAssembly, each in a warm worker."""
