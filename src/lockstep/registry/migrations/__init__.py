"""The registry's schema, revision by revision. `lockstep.registry.schema` runs them."""
