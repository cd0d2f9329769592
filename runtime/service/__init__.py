"""HTTP in, sound out: a waiting list, one thread that generates, and the web application around them.

`jobs` and `worker` know nothing of HTTP; `fields`, `problems`, `gate` and `app` nothing of engines; `server` runs both.
"""
