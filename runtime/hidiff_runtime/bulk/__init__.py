"""Many pictures from a table of prompts, by a pool of workers on Ray Data, into a folder or a bucket.

``rows`` and ``reading`` say what is asked for, ``storage`` and ``output`` what there is, ``plan`` what is left to do,
``maker`` makes a row's pictures, ``cluster`` alone knows Ray, and ``job`` is the whole of it. Needs
``pip install 'hidiff-runtime[bulk]'``.
"""
