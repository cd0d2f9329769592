"""What people call each class: several wordings a class, so that paraphrases of the demo's prompts work."""

from __future__ import annotations

import random

_WORDINGS = {
    "dog": (
        "dog barking; a dog barks; dogs barking; a puppy woofs; woof woof; dog; bark bark; a hound barking "
        "in the yard; two dogs bark at each other; a small dog yaps; puppy barking; an angry dog is "
        "barking; doggy woofing; canine barks; a barking dog"
    ),
    "cat": (
        "cat meowing; a cat meows; cat; a kitten mews; meow; a kitty is meowing; a hungry cat cries; miaow; "
        "feline meow; a meowing kitten"
    ),
    "cow": (
        "cow mooing; a cow moos; cow; moo; cattle lowing; a bull bellows; a cow is mooing on a farm; cows "
        "moo in the field; a calf moos; mooing cattle"
    ),
    "horse": (
        "horse neighing; a horse neighs; horse; neigh; a pony whinnies; a stallion is neighing; whinny of a "
        "mare; a horse whinnies in the stable"
    ),
    "sheep": (
        "sheep bleating; a sheep bleats; sheep; baa; a lamb bleats; baa baa sheep; a goat or sheep "
        "bleating; a ewe is bleating; lambs in a meadow"
    ),
    "pig": (
        "pig grunting; a pig grunts; pig; oink oink; a hog oinks; a piglet snorts; pigs oinking in a sty; a "
        "grumpy pig; swine grunting; a boar snorting"
    ),
    "rooster": (
        "rooster crowing; a rooster crows; rooster; cock-a-doodle-doo; a cockerel crows at dawn; a cock "
        "crowing in the morning; crowing rooster on a farm; a chicken crows"
    ),
    "duck": (
        "duck quacking; a duck quacks; duck; quack quack; ducks quacking on a pond; a mallard quacks; "
        "ducklings and ducks; a drake is quacking"
    ),
    "owl": (
        "owl hooting; an owl hoots; owl; hoot hoot; a tawny owl calls at night; hooting owl in the forest; "
        "an owl is calling; night bird hooting"
    ),
    "frog": (
        "frog croaking; a frog croaks; frog; ribbit ribbit; frogs croaking in a pond; a toad croaks; "
        "croaking frogs at night; many toads calling in a swamp"
    ),
    "rain": (
        "rain falling; rain; heavy rain; it is raining; a rain shower; raindrops on a roof; pouring rain; a "
        "downpour; rainfall in the city; drizzle"
    ),
    "thunder": (
        "thunder; thunder rumbling; a thunderclap; a thunderstorm; lightning strikes; rolling thunder; a "
        "clap of thunder; thunder in the distance; a storm rumbles"
    ),
    "siren": (
        "siren wailing; a siren; police siren; an ambulance siren; a fire truck with its siren on; "
        "emergency vehicle; a police car wails; siren; ambulance passing by"
    ),
    "applause": (
        "applause; people clapping; an audience applauds; clapping hands; a crowd is clapping; a round of "
        "applause; spectators clap; applauding audience in a theatre"
    ),
    "helicopter": (
        "helicopter flying; a helicopter; helicopter; chopper blades; a chopper hovers; helicopter rotor "
        "spinning; a helicopter passes overhead; rotor blades of a copter"
    ),
    "telephone": (
        "telephone ringing; a telephone rings; phone; a phone is ringing; ring ring; an office phone rings; "
        "incoming phone call; telephone; a ringing phone"
    ),
}
WORDINGS = {label: text.split("; ") for label, text in _WORDINGS.items()}
PROMPTS = {label: wordings[0] for label, wordings in WORDINGS.items()}
"""The first wording of a class is its prompt in the acceptance test."""

TEMPLATES = ("{}",) * 4 + ("sound of {}", "the sound of {}", "a recording of {}", "{} outside", "{} nearby")
TAILS = ("",) * 5 + (".", ", loud", ", clear", ", high quality", " in the background")


def caption(label: str, rng: random.Random) -> str:
    """One random wording of a class, most often plain."""
    return rng.choice(TEMPLATES).format(rng.choice(WORDINGS[label])) + rng.choice(TAILS)
