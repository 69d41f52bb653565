"""Many pictures from a table of prompts, by a pool of workers on Ray Data, into a folder or a bucket.

``rows`` says what is asked for, ``storage`` and ``output`` what there is, ``resume`` what is left to do, ``row_worker``
makes a row's pictures, ``ray_pool`` alone knows Ray, and ``job`` is the whole of it. Needs
``pip install 'hidiff-runtime[bulk]'``.
"""
