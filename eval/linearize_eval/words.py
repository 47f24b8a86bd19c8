"""Words planted by the key lookup: keys and values, plain English nouns, no word in both lists."""

KEYS = tuple(
    """
    garden kitchen window ladder basket candle mirror blanket hammer bottle pencil carpet
    engine wagon tunnel harbor bridge castle temple museum library station market factory
    doctor farmer teacher sailor painter baker hunter soldier lawyer writer pilot singer
    mountain valley desert island forest river meadow canyon glacier volcano lagoon prairie
    """.split()
)
VALUES = tuple(
    """
    silver copper purple yellow orange crimson marble velvet cotton leather amber ivory
    tiger eagle rabbit turtle falcon salmon spider monkey donkey beaver lizard pigeon
    apple lemon cherry banana tomato pepper garlic ginger walnut almond pumpkin carrot
    winter summer thunder rainbow shadow diamond crystal feather anchor compass trumpet violin
    """.split()
)
