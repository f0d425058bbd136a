"""HTTP in front of one engine: Chat Completions, models, health.

``app`` routes and errors · ``chat`` the chat endpoint · ``bridge`` engine thread to event loop ·
``answering`` what it shares with the terminal · ``connection``, ``run`` uvicorn. This is the only
package with async code.
"""
