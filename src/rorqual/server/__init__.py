"""HTTP in front of one engine: Chat Completions, models, health.

``app`` routes and errors · ``chat`` the chat endpoint · ``bridge`` engine thread to event loop ·
``run`` uvicorn. This is the only package with async code, and the only owner of an engine's
requests.
"""
