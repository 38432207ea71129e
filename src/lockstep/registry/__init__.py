"""The two questions that stand before every mirrored write.

`store.Registry` answers the first, does this target have a mirror; `access.decide` the second, may this user
update it now. A leaf: it imports lockstep.errors only.
"""
