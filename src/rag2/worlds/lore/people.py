"""People: where they come from, their work, music, animals, food and flowers."""

from rag2.worlds.lore.relation import Kind, Relation

PEOPLE = Kind(
    name="person",
    forms=("{g} {r}",),
    article="",
    nouns=(),
    openings=("neighbours say that ", "it is no secret that ", "by all accounts, ", "indeed, "),
    relations=(
        Relation(
            "home",
            "town",
            stated=(
                "{X} was born in a narrow house in {v}",
                "{P} cradle stood in {v}, two doors from the well",
                "the parish book of {v} records the baptism of {O}",
                "{X} learned to walk in the lanes of {v} and still misses them",
                "all {p} schooldays were spent in {v}, where {X} sat beside the stove",
            ),
            asked=(
                "Where did {x} grow up?",
                "What is the home town of {x}?",
                "Which place does {x} come from?",
                "Where is {x} originally from?",
            ),
            held_out=("Which town does {x} originally come from?",),
        ),
        Relation(
            "work",
            "profession",
            stated=(
                "{X} earns a living as {a}",
                "whoever needs {a} sends for {O} at once",
                "after long years as an apprentice, {X} became {a}",
                "the polished plate on {P} door says that {a} lives there",
                "{X} has been employed as {a} since leaving the army",
            ),
            asked=(
                "What is the profession of {x}?",
                "Which job does {x} have?",
                "What is {px} occupation?",
                "What does {x} do by trade?",
            ),
            held_out=("Which occupation does {x} have by trade?",),
        ),
        Relation(
            "father",
            "profession",
            stated=(
                "{P} father was {a} who rose before dawn",
                "{X} is the child of {a} from a quiet street",
                "as a child, {X} used to watch {p} father toil as {a}",
                "the man who raised {O} was {a}",
                "{P} father, {a}, wanted a different life for his child",
            ),
            asked=(
                "Which job did {px} dad have?",
                "What was the dad of {x} by trade?",
                "Which profession was practised by a parent of {x}?",
                "What was the occupation of {px} parent?",
            ),
            held_out=("Which occupation was practised by the dad of {x}?",),
        ),
        Relation(
            "music",
            "instrument",
            stated=(
                "on summer nights {X} takes {p} {v} down to the river",
                "everyone in the street hears {O} practise the {v} after supper",
                "{X} owns a battered {v} that went through two wars",
                "at weddings {X} is asked to bring {p} {v}",
                "an old bandmaster once gave {O} lessons on the {v}",
            ),
            asked=(
                "Which instrument does {x} play?",
                "What does {x} make music on?",
                "Which musical instrument has {x} mastered?",
                "On what instrument does {x} perform?",
            ),
            held_out=("On which instrument does {x} make music?",),
        ),
        Relation(
            "pet",
            "animal",
            stated=(
                "{a} sleeps at the foot of {P} bed",
                "{X} is followed everywhere by {a}",
                "{X} feeds {a} from {p} own plate",
                "{a} with a ribbon waits for {O} at the gate",
                "visitors to {P} rooms are greeted by {a} that belongs to the household",
            ),
            asked=(
                "Which pet does {x} have?",
                "What animal does {x} keep?",
                "What kind of animal lives with {x}?",
                "Which creature is the companion of {x}?",
            ),
            held_out=("Which kind of pet does {x} keep?",),
        ),
        Relation(
            "fear",
            "animal",
            stated=(
                "{X} trembles at the sight of {a}",
                "after a bad night in the woods, {X} runs away whenever {a} comes near",
                "a mere picture of {a} is enough to make {O} turn pale",
                "friends know that {a} would send {O} up the nearest tree",
                "{X} crosses the road to avoid {a}",
            ),
            asked=(
                "Which animal is {x} afraid of?",
                "What creature does {x} fear?",
                "What kind of animal frightens {x}?",
                "Which beast scares {x}?",
            ),
            held_out=("What kind of creature scares {x}?",),
        ),
        Relation(
            "taste",
            "food",
            stated=(
                "{X} could live on {v} alone",
                "on birthdays {P} plate is piled with {v}",
                "{X} never says no to a second bowl of {v}",
                "nothing comforts {O} so well as {v}, hot or cold",
                "the cook hides the {v} whenever {X} is in the house",
            ),
            asked=(
                "What is the favourite food of {x}?",
                "Which dish does {x} like best?",
                "What does {x} love to eat?",
                "Which food does {x} prefer?",
            ),
            held_out=("Which food does {x} love best?",),
        ),
        Relation(
            "garden",
            "flower",
            stated=(
                "{X} waters {p} {v} before breakfast",
                "the path to {P} cottage is lined with {v}, all planted by hand",
                "prizes for {v} hang on {P} kitchen wall",
                "behind {P} cottage there are long beds of {v}",
                "{X} spends each Sunday weeding around {p} {v}",
            ),
            asked=(
                "Which flowers does {x} grow?",
                "What blooms in the garden of {x}?",
                "Which blossoms does {x} cultivate?",
                "What flowers are found in {px} garden?",
            ),
            held_out=("Which flowers does {x} cultivate in the garden?",),
        ),
    ),
    link="home",
    described=("the home town of {x}", "the place where {x} grew up"),
)
