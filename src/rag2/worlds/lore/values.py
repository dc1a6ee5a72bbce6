"""Closed inventories of common words, one per value type; no word belongs to two types."""

VALUES: dict[str, tuple[str, ...]] = {
    "goods": tuple(
        "herring salt wool amber tin barley wax flax copper coal hemp sugar silk cork resin "
        "pepper tobacco indigo ivory paper cotton rye tallow chalk saffron soap".split()
    ),
    "month": tuple(
        "January February March April May June July August September October November "
        "December".split()
    ),
    "material": tuple(
        "slate brick marble granite clay sandstone limestone bronze iron flint concrete basalt "
        "steel zinc quartz plaster glass alabaster travertine brass".split()
    ),
    "wood": tuple(
        "oak cedar elm pine larch teak walnut maple birch chestnut beech willow poplar spruce "
        "cypress mahogany ebony hazel alder yew".split()
    ),
    "animal": tuple(
        "fox heron otter wolf badger hare owl stag eagle bear raven swan goat lynx tortoise "
        "hedgehog falcon weasel beaver parrot donkey cat dog rooster goose mule pony ferret "
        "squirrel magpie".split()
    ),
    "food": tuple(
        "porridge trout cheese gingerbread mutton cabbage spinach rhubarb marzipan salmon venison "
        "cornbread custard bacon toffee broth goulash chowder ham yogurt popcorn celery garlic "
        "marmalade".split()
    ),
    "profession": tuple(
        "baker tailor mason potter weaver cobbler blacksmith carpenter miller fisherman teacher "
        "judge doctor lawyer painter printer librarian butcher gardener shepherd clockmaker "
        "barber glazier nurse surveyor notary plumber brewer".split()
    ),
    "instrument": tuple(
        "fiddle flute lute harp drum trumpet piano guitar banjo cello oboe clarinet accordion "
        "zither tuba horn organ viola mandolin trombone bassoon".split()
    ),
    "flower": tuple(
        "roses tulips lilies daisies poppies violets irises orchids asters dahlias peonies "
        "marigolds foxgloves snowdrops crocuses daffodils bluebells begonias pansies "
        "geraniums".split()
    ),
    "colour": tuple(
        "red blue green yellow white black orange purple grey brown pink crimson turquoise "
        "scarlet maroon beige olive teal azure lilac".split()
    ),
    "product": tuple(
        "clocks lanterns barrels saddles kettles candles boots ropes anchors bells mirrors locks "
        "ladders baskets hats gloves carpets buttons knives umbrellas compasses telescopes spoons "
        "kites puppets combs brushes needles".split()
    ),
}
TOWN = "town"  # the one type whose values are other entities
