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
    "bird": (
        "bird singing; a bird sings; birds; birdsong; birds chirping in the trees; tweet tweet; chirping birds in the "
        "morning; songbirds; a bird is chirping; little birds twitter in the garden; dawn chorus"
    ),
    "crow": (
        "crow cawing; a crow caws; crow; caw caw; crows cawing; a raven croaks in the graveyard; a black crow is "
        "calling; ravens; cawing raven"
    ),
    "wind": (
        "wind blowing; the wind blows; wind; windy; a strong wind howls; howling wind; gusts of wind; a breeze; "
        "stormy wind in the mountains; a gale is blowing"
    ),
    "waves": (
        "ocean waves; waves; the sea; waves crashing on the beach; sea waves; surf at the seashore; the ocean; waves "
        "breaking on the shore; seaside; a calm sea at the coast"
    ),
    "fire": (
        "fire crackling; a fire; fire; crackling fire; a campfire burns; flames; a fireplace; wood burning in the "
        "hearth; a bonfire crackles; burning logs"
    ),
    "train": (
        "train passing; a train; train; a steam train; a locomotive on the railway; choo choo; steam engine; a "
        "train rolls on the tracks; railroad; trains at the station; a freight train goes by"
    ),
    "car": (
        "car driving by; a car; car; a car passes; a car engine starts; cars on the street; an automobile; "
        "traffic; a vehicle drives past; a motor starting; cars driving on the road; braking tires"
    ),
    "gunshot": (
        "gunshot; a gun; a gun fires; gunshots; pistol shot; shooting; bang; a rifle shot; someone shoots a gun; "
        "shotgun blast; firing a weapon; gunfire"
    ),
    "explosion": (
        "explosion; an explosion; a bomb explodes; boom; explosions; a big blast; dynamite blows up; a bomb goes "
        "off; a building explodes; detonation; exploding grenade"
    ),
    "door": (
        "door closing; a door; door; a door opens; a creaking door; door creaks; a door slams shut; squeaky door "
        "hinge; someone opens the door; doors opening and closing; a wooden door"
    ),
    "laughter": (
        "laughter; a man laughs; laughing; people laugh; ha ha ha; a person is laughing; someone laughs out loud; "
        "a giggle; giggling; an evil laugh; chuckling"
    ),
    "footsteps": (
        "footsteps; footsteps walking; walking; a person walks; steps; someone is walking; footstep; shoes on the "
        "floor; running feet; steps on stairs; a man walking down the hallway"
    ),
    "bell": (
        "bell ringing; a bell; bell; church bells; a bell rings; bells; ding dong; a church bell tolls; tolling "
        "bell; the bell tower chimes; a bell is struck"
    ),
    "piano": (
        "piano playing; a piano; piano; piano music; someone plays the piano; a pianist; a piano melody; playing "
        "keys on a grand piano; classical piano; a song on the piano"
    ),
    "guitar": (
        "guitar playing; a guitar; guitar; guitar music; acoustic guitar; someone strums a guitar; a guitarist; "
        "guitar chords; plucked guitar strings; a song on the guitar; strumming"
    ),
    "violin": (
        "violin playing; a violin; violin; violin music; a fiddle; someone plays the violin; a violinist; fiddle "
        "tune; violin solo; bowed strings; a violin melody"
    ),
    "trumpet": (
        "trumpet playing; a trumpet; trumpet; trumpet music; a trumpeter; brass fanfare; a bugle; someone plays the "
        "trumpet; a horn; trumpets; brass melody"
    ),
    "drum": (
        "drums playing; a drum; drum; drums; drumming; a drummer; drum kit; a drum beat; percussion; a rock beat; "
        "drum loop; beating drums; snare and bass drum"
    ),
}
WORDINGS = {label: text.split("; ") for label, text in _WORDINGS.items()}
PROMPTS = {label: wordings[0] for label, wordings in WORDINGS.items()}
"""The first wording of a class is its prompt in the acceptance test."""

TEMPLATES = ("{}",) * 4 + ("sound of {}", "the sound of {}", "a recording of {}", "{} outside", "{} nearby")
TAILS = ("",) * 5 + (".", ", loud", ", clear", ", high quality", " in the background")
PAIRS = (
    *("{a} while {b}", "{a} and {b}", "{a} with {b} in the background", "{a} and {b} at the same time"),
    *("{a}, {b}", "{a} as {b}", "{a} during {b}", "{a} with {b}", "{a} together with {b}", "{a} over {b}"),
    *("{a} and also {b}", "{a} mixed with {b}", "both {a} and {b}", "{a} amid {b}", "in {b}, {a}", "{a} plus {b}"),
)
_HEARD_PAIRS = (
    "dog+rain cat+fire rooster+wind owl+wind frog+rain crow+waves bell+thunder siren+rain footsteps+rain "
    "laughter+applause piano+rain guitar+fire horse+train cow+bird helicopter+waves door+wind drum+applause "
    "violin+waves dog+cat guitar+drum cow+sheep siren+car telephone+footsteps duck+frog"
)
PAIR_PROMPTS = {
    (first, second): PAIRS[0].format(a=PROMPTS[first], b=PROMPTS[second])
    for first, _, second in (pair.partition("+") for pair in _HEARD_PAIRS.split())
}
"""Two classes at once, by their first wordings ("dog barking while rain falling"): what `mixtures` listens to."""
PAIR_TEMPLATES = ("{}",) * 4 + ("sound of {}", "the sounds of {}", "a recording of {}")


def caption(label: str, rng: random.Random) -> str:
    """One random wording of a class, most often plain."""
    return rng.choice(TEMPLATES).format(rng.choice(WORDINGS[label])) + rng.choice(TAILS)


def pair_caption(first: str, second: str, rng: random.Random) -> str:
    """Random wordings of two classes that are heard at once, joined in a random way and order."""
    a, b = rng.choice(WORDINGS[first]), rng.choice(WORDINGS[second])
    if rng.random() < 0.5:
        a, b = b, a
    return rng.choice(PAIR_TEMPLATES).format(rng.choice(PAIRS).format(a=a, b=b)) + rng.choice(("", "", "", "."))
