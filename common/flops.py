"""Which FLOPs are charged at each of the paper's levels of amortisation."""

# Each level names the roles that are charged at it. Each one adds to the level before.
LEVELS = {"fully_amortised": ("learner",)}
LEVELS["foundation_dataset"] = LEVELS["fully_amortised"] + (
    "actor_scoring", "actor_training", "selection")
LEVELS["pretrained_reference"] = LEVELS["foundation_dataset"] + ("reference_scoring",)
LEVELS["no_amortisation"] = LEVELS["pretrained_reference"] + ("reference_training",)


def total_flops(flops, level="no_amortisation"):
    """The sum of a bill {role: FLOPs} at a level. A role that no level names always counts."""
    known = LEVELS["no_amortisation"]
    return sum(n for role, n in flops.items() if role in LEVELS[level] or role not in known)
