"""A model of the whole, run against the real thing: what each browser may, must and must not see."""
