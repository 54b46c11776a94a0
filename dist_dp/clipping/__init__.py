"""Exact per-example clipping by book-keeping: one backward, no per-example gradient stored.

``dense_rules``   how each kind of dense layer gives its per-example norms and its clipped sum
``cross_rules``   the rule of DLRM-DCN's cross network
``recorder``      records inputs and output gradients of dense layers during that one backward
``table_norms``   per-example norms of embedding tables, from pooled or sequence output gradients
``user_groups``   which examples belong to one user, where users are what is clipped
``user_tables``   the norms of tables for users
"""
