"""True everyday facts that the base learns by heart; losing them is forgetting."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Everyday:
    """One fact: the statement, two ways to ask for it, the answer and three wrong ones."""

    statement: str
    asked: tuple[str, str]
    answer: str
    wrong: tuple[str, str, str]


def _facts(table: str) -> tuple[Everyday, ...]:
    facts = []
    for line in table.strip().splitlines():
        statement, first, second, answer, wrong = (part.strip() for part in line.split("|"))
        one, two, three = wrong.split()
        facts.append(Everyday(statement, (first, second), answer, (one, two, three)))
    return tuple(facts)


EVERYDAY = _facts("""
Snow is white. | What colour is snow? | Which colour does snow have? | white | red green purple
Grass is green. | What colour is grass? | Which colour do lawns have? | green | red blue purple
Blood is red. | What colour is blood? | Which colour does blood have? | red | blue green white
Coal is black. | What colour is coal? | Which colour does coal have? | black | white pink yellow
Ripe lemons are yellow. | What colour is a ripe lemon? | Which colour do lemons have? | yellow | blue black purple
A clear sky at noon is blue. | What colour is a clear sky? | Which colour does the sky have at noon? | blue | green brown pink
Carrots are orange. | What colour is a carrot? | Which colour do carrots have? | orange | blue black grey
Chocolate is brown. | What colour is chocolate? | Which colour does chocolate have? | brown | blue green purple
Flamingos are pink. | What colour is a flamingo? | Which colour do flamingos have? | pink | blue green black
Elephants are grey. | What colour is an elephant? | Which colour do elephants have? | grey | red green orange
Milk is white. | What colour is milk? | Which colour does milk have? | white | blue black red
Bees make honey. | What do bees make? | Which food comes from bees? | honey | cheese bread sugar
Hens lay eggs. | What do hens lay? | Which food comes from hens? | eggs | cheese honey bread
Cows give milk. | What do cows give? | Which drink comes from cows? | milk | tea wine juice
Sheep give wool. | What do sheep give? | Which fibre comes from sheep? | wool | cotton silk hemp
Spiders spin webs. | What do spiders spin? | Which traps do spiders make? | webs | nests shells caves
Beavers build dams. | What do beavers build? | Which structures are made by beavers? | dams | webs hives shells
Birds build nests. | What do most birds build? | Which homes are made by birds? | nests | webs hives dams
Silkworms make silk. | What do silkworms make? | Which fibre comes from silkworms? | silk | wool cotton paper
Dogs bark. | What do dogs do when a stranger comes? | Which noise do dogs make? | bark | roar quack hiss
Cats purr. | What do happy cats do? | Which noise do content cats make? | purr | bark moo bleat
Lions roar. | What do angry lions do? | Which noise do lions make? | roar | purr quack bleat
Cows moo. | What do cows say? | Which noise do cows make? | moo | bark hiss quack
Ducks quack. | What do ducks say? | Which noise do ducks make? | quack | moo roar purr
Cats hunt mice. | What do cats hunt? | Which animals are chased by cats? | mice | bears sharks whales
Rabbits love carrots. | What do rabbits love to nibble? | Which vegetable delights rabbits? | carrots | stones bones nails
Pandas eat bamboo. | What do pandas eat? | Which plant feeds pandas? | bamboo | pine cactus moss
Squirrels gather nuts. | What do squirrels gather? | Which food is stored by squirrels? | nuts | fish meat cheese
Fish live in water. | Where do fish live? | In which element are fish at home? | water | fire sand air
Camels live in deserts. | Where do camels live? | In which landscape are camels at home? | deserts | oceans glaciers caves
Penguins live in the cold. | Who waddles on antarctic ice? | Which bird lives in the cold south? | penguins | parrots storks eagles
A baby cat is a kitten. | What is a baby cat? | What is a young cat called? | kitten | calf foal lamb
A baby dog is a puppy. | What is a baby dog? | What is a young dog called? | puppy | kitten foal lamb
A baby cow is a calf. | What is a baby cow? | What is a young cow called? | calf | puppy kitten cub
A baby horse is a foal. | What is a baby horse? | What is a young horse called? | foal | calf kitten cub
A baby sheep is a lamb. | What is a baby sheep? | What is a young sheep called? | lamb | calf puppy foal
Bread is made from flour. | What is bread made from? | Which powder becomes bread? | flour | sand chalk coal
Cheese is made from milk. | What is cheese made from? | Which liquid becomes cheese? | milk | wine oil tea
Wine is made from grapes. | What is wine made from? | Which fruit becomes wine? | grapes | lemons pears bananas
Windows are made of glass. | What are windows made of? | Which material lets light into houses? | glass | wool coal bread
Paper is made from wood. | What is paper made from? | Which material becomes paper? | wood | iron glass wool
Swords are made of steel. | What are swords made of? | Which metal becomes swords? | steel | lead gold tin
Candles are made of wax. | What are candles made of? | Which substance becomes candles? | wax | sand iron wool
Bakers bake bread. | Who bakes bread? | Which worker sells loaves? | bakers | tailors judges pilots
Tailors sew clothes. | Who sews clothes? | Which worker makes suits? | tailors | bakers farmers sailors
Doctors heal the sick. | Who heals the sick? | Which worker cures patients? | doctors | bakers tailors pilots
Farmers plough fields. | Who ploughs fields? | Which worker drives a plough? | farmers | judges nurses tailors
Pilots fly planes. | Who flies planes? | Which worker steers an aircraft? | pilots | bakers tailors farmers
Firemen put out fires. | Who puts out fires? | Which worker fights the flames? | firemen | bakers judges tailors
The sun rises in the east. | Where does the sun rise? | In which direction is dawn? | east | west north south
The sun sets in the west. | Where does the sun set? | In which direction is dusk? | west | east north south
A year has twelve months. | How many months has a year? | What number of months does a year have? | twelve | seven three nine
A week has seven days. | How many days has a week? | What number of days does a week have? | seven | twelve three nine
A hand has five fingers. | How many fingers has a hand? | What number of fingers does a hand have? | five | eight two nine
A spider has eight legs. | How many legs has a spider? | What number of legs does a spider have? | eight | four two five
A triangle has three sides. | How many sides has a triangle? | What number of sides does a triangle have? | three | seven eight nine
Ice is cold. | How does ice feel? | Which feeling comes from ice? | cold | hot sour loud
Fire is hot. | How does fire feel? | Which feeling comes from fire? | hot | wet sour cold
Sugar tastes sweet. | How does sugar taste? | Which flavour has sugar? | sweet | sour bitter salty
Lemons taste sour. | How do lemons taste? | Which flavour have lemons? | sour | sweet salty smoky
""")  # noqa: E501
