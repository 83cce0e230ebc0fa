"""Models with a meta level: the bilevel module and the representation transform."""
