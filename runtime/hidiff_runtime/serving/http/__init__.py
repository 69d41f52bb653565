"""``hidiff-serve``: a bundle behind OpenAI's images endpoint, with a page to try it.

FastAPI and what comes with it are imported in this folder alone: ``pip install 'hidiff-runtime[serve]'``.
"""
