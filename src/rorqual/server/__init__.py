"""HTTP in front of one engine: three protocols, models, health, and the doors before them.

``app`` doors and routes together · ``routes`` every path of the protocols · ``endpoint`` what all
generating endpoints do · ``conversations``, ``completions``, ``models`` what they serve ·
``openapi`` the document about them · ``history`` turns remembered · ``failures`` every error in
every protocol's shape · ``bridge`` engine thread to event loop · ``answering`` what it shares with
the terminal · ``connection``, ``run`` uvicorn. This is the only package with async code.
"""
