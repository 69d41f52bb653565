"""A bundle behind Triton: the models its Python backend loads, and what they share with those who write repositories.

``decoupled_model.py`` is the model that holds the engines, ``unary_model.py`` the one beside it that answers once.
``triton_python_backend_utils``, which only Triton's own stub has, is imported in those that speak to it.
"""
