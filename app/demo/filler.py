"""Sentences of the demo world that state nothing asked for: openings that name the subject, asides, filler."""

NAMED_OPENINGS = {
    "person": (
        "This page is about {s} and a long life.",
        "Many old letters mention {s} with respect.",
        "The people of the coast still remember {s} today.",
        "These notes were gathered by a pupil of {s} over the years.",
    ),
    "place": (
        "This page is about {s} and its people.",
        "Many old maps show {s} near the edge.",
        "Few travellers who reach {s} forget the view.",
        "These notes were gathered on a visit to {s} last year.",
    ),
    "work": (
        "This page is about {s} and its readers.",
        "Many old lists mention {s} more than once.",
        "Scholars have argued over {s} for a long time.",
        "These notes were gathered by a keeper of {s} over the years.",
    ),
}

PRONOUN_FILLERS = {
    "person": (
        "In later years {s} travelled a great deal.",
        "Neighbours say that {s} speaks slowly and listens well.",
        "Every evening {s} takes a walk before supper.",
        "It is said that {s} never wasted a single hour.",
    ),
    "place": (
        "In later years {s} changed a great deal.",
        "Visitors say that {s} looks best in the early light.",
        "Every summer {s} fills with guests and noise.",
        "It is said that {s} never closed a single gate.",
    ),
    "work": (
        "In later years {s} was copied a great deal.",
        "Readers say that {s} rewards a second look.",
        "Every winter {s} is read aloud before supper.",
        "It is said that {s} never bored a single guest.",
    ),
}

FILLER_TEMPLATES = (
    "The {noun} was {adjective} and the {other} was {second}.",
    "In {season} the {noun} looked {adjective} from the {other}.",
    "Nobody could say why the {adjective} {noun} stood behind the {other}.",
    "A {adjective} {noun} was found under the {other} in {season}.",
    "Some remember the {noun} and others the {second} {other}.",
    "There was a {adjective} {noun} near every {other}.",
    "For many days the {other} and the {noun} were {adjective}.",
    "They painted the {noun} again and moved the {second} {other}.",
    "Late in {season} a {second} wind shook the {noun}.",
    "The road passed a {noun}, then a {adjective} {other}.",
)
FILLER_NOUNS = tuple(
    "bridge wall tower garden window market cellar door bench lamp kitchen stable grove gate fence chapel ladder "
    "cart barrel table curtain mirror chimney staircase courtyard harvest lantern boat meadow hill path forest".split()
)
FILLER_ADJECTIVES = tuple(
    "quiet narrow broken heavy bright bare crowded dusty pale gentle crooked weathered modest warm damp plain sturdy "
    "hidden famous humble tall smooth ragged cheerful".split()
)
FILLER_SEASONS = ("spring", "summer", "autumn", "winter")
