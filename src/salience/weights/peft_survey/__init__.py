"""The survey of parameter-efficient tuning as one registry: five families, over `peft` and the members it lacks."""
