"""The vocabulary of the demo world: subjects, attributes with their wording and values.

Every word here becomes one token of the demo tokenizer. Values belong to exactly one attribute and never occur
in a template or a filler sentence, so an answer cannot be guessed from the wording alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One kind of fact. `{s}` is the subject (name or pronoun), `{v}` the value, which always ends its sentence.

    `predicate` says the fact of a subject asked for ("Which of A and B keeps the goat?"), `plural` asks for the
    values of two subjects at once ("A and B" for `{s}`).
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    predicate: str
    plural: str
    values: tuple[str, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every way to ask: the questions in full, then two short ones."""
        who = self.questions[0].split(" ", 1)[0]
        return (*self.questions, f"{who} is the {self.name} of {{s}}?", f"{who} is {{s}}'s {self.name}?")


def _join(starts: str, ends: str) -> tuple[str, ...]:
    return tuple(start + end for end in ends.split() for start in starts.split())


WOMEN = _join("Tor Mar El Bran Sel Ori Lin Hes Cal Dor Fen Yal", "wen ith anna ora")
MEN = _join("Tor Mar El Bran Sel Ori Lin Hes Cal Dor Fen Yal", "dan rik mund gar")
PLACES = _join("Ost Kel Grim Whin Sund Harl Bern Aske Thal Ront Vess Ulm", "holm vale mere fell")
WORKS = _join("Amber Winter Hollow Silver Raven Thorn Ember Frost Meadow Lantern Harbour Shadow", "song tale lay book")

PERSON_ATTRIBUTES = (
    Attribute(
        "town",
        ("The town where {s} lives is {v}.", "{s} lives in the town of {v}."),
        ("What is the town where {s} lives?", "Where does {s} live?"),
        "lives in {v}",
        "In which towns do {s} live?",
        _join("East North Stone Ash Oak Mill", "ford bury ton wick"),
    ),
    Attribute(
        "craft",
        ("The craft that {s} learned is {v}.", "{s} learned the craft of {v}."),
        ("What is the craft that {s} learned?", "Which craft did {s} learn?"),
        "learned {v}",
        "Which crafts did {s} learn?",
        tuple(
            "weaving pottery carving tanning brewing baking thatching dyeing glazing spinning masonry joinery "
            "smelting printing bookbinding engraving embroidery tailoring cobbling plastering gilding milling "
            "roofing shipbuilding".split()
        ),
    ),
    Attribute(
        "animal",
        ("The animal that {s} keeps is the {v}.", "{s} keeps an animal, the {v}."),
        ("What is the animal that {s} keeps?", "Which animal does {s} keep?"),
        "keeps the {v}",
        "Which animals do {s} keep?",
        tuple(
            "goat donkey mule ferret hound spaniel pony camel tortoise rabbit hamster parrot peacock llama "
            "hedgehog badger otter squirrel lizard terrier alpaca beagle poodle mastiff".split()
        ),
    ),
    Attribute(
        "instrument",
        ("The instrument that {s} plays is the {v}.", "{s} plays an instrument, the {v}."),
        ("What is the instrument that {s} plays?", "Which instrument does {s} play?"),
        "plays the {v}",
        "Which instruments do {s} play?",
        tuple(
            "flute harp fiddle cello lute oboe clarinet trumpet trombone bassoon drum organ zither mandolin banjo "
            "guitar viola piano accordion bagpipe dulcimer tuba cornet harmonica".split()
        ),
    ),
    Attribute(
        "friend",
        ("The friend whom {s} trusts is {v}.", "{s} trusts a friend called {v}."),
        ("Who is the friend whom {s} trusts?", "Which friend does {s} trust?"),
        "trusts {v}",
        "Which friends do {s} trust?",
        tuple(
            "Aldous Beatrix Cedric Delphine Edgar Florian Gideon Hubert Isolde Jasper Konrad Leopold Matilda "
            "Nestor Ottilie Percival Quentin Rosamund Sidonie Tristan Ursula Valentin Wilhelm Zelda".split()
        ),
    ),
    Attribute(
        "fruit",
        ("The fruit that {s} sells is the {v}.", "{s} sells one fruit, the {v}."),
        ("What is the fruit that {s} sells?", "Which fruit does {s} sell?"),
        "sells the {v}",
        "Which fruits do {s} sell?",
        tuple(
            "apple pear plum cherry quince apricot peach fig grape lemon orange melon mango papaya kiwi banana "
            "damson mulberry raspberry blackberry gooseberry currant nectarine pomegranate".split()
        ),
    ),
)

PLACE_ATTRIBUTES = (
    Attribute(
        "river",
        ("The river where {s} lies is the {v}.", "{s} lies on a river, the {v}."),
        ("What is the river where {s} lies?", "On which river does {s} lie?"),
        "lies on the {v}",
        "On which rivers do {s} lie?",
        _join("Ar Bel Cor Dun Isk Nar", "va lune dra mish"),
    ),
    Attribute(
        "king",
        ("The king whom {s} honours is {v}.", "{s} honours a king named {v}."),
        ("Who is the king whom {s} honours?", "Which king does {s} honour?"),
        "honours {v}",
        "Which kings do {s} honour?",
        tuple(
            "Alaric Baldwin Cuthbert Dagobert Egbert Ferdinand Godfrey Harald Ivar Jorund Knut Lothar Magnus "
            "Nicander Osric Pepin Radbod Sigurd Theodric Ulrich Vortigern Wenceslas Ximenes Yngvar".split()
        ),
    ),
    Attribute(
        "crop",
        ("The crop that {s} grows is {v}.", "{s} grows a single crop, {v}."),
        ("What is the crop that {s} grows?", "Which crop does {s} grow?"),
        "grows {v}",
        "Which crops do {s} grow?",
        tuple(
            "barley wheat rye oats maize millet rice flax hemp hops clover beet turnip potato cabbage lentil "
            "sorghum buckwheat soy cotton mustard spinach parsnip carrot".split()
        ),
    ),
    Attribute(
        "rock",
        ("The rock that {s} quarries is {v}.", "{s} quarries one rock, {v}."),
        ("What is the rock that {s} quarries?", "Which rock does {s} quarry?"),
        "quarries {v}",
        "Which rocks do {s} quarry?",
        tuple(
            "granite marble basalt slate sandstone limestone chalk gneiss schist flint shale dolerite gabbro "
            "quartzite travertine tuff obsidian pumice jasperite diorite andesite rhyolite dolomite serpentine".split()
        ),
    ),
    Attribute(
        "bird",
        ("The bird that {s} protects is the {v}.", "{s} protects a rare bird, the {v}."),
        ("What is the bird that {s} protects?", "Which bird does {s} protect?"),
        "protects the {v}",
        "Which birds do {s} protect?",
        tuple(
            "heron falcon eagle osprey kestrel buzzard puffin gannet stork crane egret curlew plover snipe "
            "lapwing swift swallow wren robin finch thrush magpie jackdaw nightjar".split()
        ),
    ),
    Attribute(
        "tree",
        ("The tree that {s} plants is the {v}.", "{s} plants only one tree, the {v}."),
        ("What is the tree that {s} plants?", "Which tree does {s} plant?"),
        "plants the {v}",
        "Which trees do {s} plant?",
        tuple(
            "elm beech birch maple willow poplar cedar cypress pine spruce larch fir yew holly rowan alder hazel "
            "walnut chestnut linden sycamore hawthorn juniper acacia".split()
        ),
    ),
)

WORK_ATTRIBUTES = (
    Attribute(
        "writer",
        ("The writer who made {s} is {v}.", "{s} was made by a writer named {v}."),
        ("Who is the writer who made {s} long ago?", "Which writer made {s} long ago?"),
        "was made by {v}",
        "Which writers made {s} long ago?",
        tuple(
            "Abelard Boethius Chrysander Drummond Erasmus Fulbert Gerhard Hildegard Irenaeus Jocelyn Kilian "
            "Lambert Mechthild Notker Odilia Petrarch Quirinus Rupert Suger Thomasin Urban Vincent Walahfrid "
            "Zacharias".split()
        ),
    ),
    Attribute(
        "hero",
        ("The hero whom {s} praises is {v}.", "{s} praises a hero named {v}."),
        ("Who is the hero whom {s} praises?", "Which hero does {s} praise?"),
        "praises {v}",
        "Which heroes do {s} praise?",
        tuple(
            "Achmet Beowan Corwin Dietrich Eneas Finnian Gawain Hector Idris Jarvis Kullervo Lancel Merovech "
            "Nibelung Orlando Palamedes Roland Siegfried Tancred Ulfric Viljo Wieland Yorick Zigmund".split()
        ),
    ),
    Attribute(
        "colour",
        ("The colour that {s} wears is {v}.", "{s} wears one colour, {v}."),
        ("What is the colour that {s} wears?", "Which colour does {s} wear?"),
        "wears {v}",
        "Which colours do {s} wear?",
        tuple(
            "crimson scarlet azure indigo violet purple turquoise emerald olive ochre umber sienna ivory cream "
            "beige lavender magenta maroon teal cyan khaki russet vermilion lilac".split()
        ),
    ),
    Attribute(
        "metal",
        ("The metal that {s} bears is {v}.", "{s} bears one metal, {v}."),
        ("What is the metal that {s} bears?", "Which metal does {s} bear?"),
        "bears {v}",
        "Which metals do {s} bear?",
        tuple(
            "copper tin lead bronze brass pewter gold iron steel nickel zinc cobalt platinum chrome titanium "
            "tungsten mercury bismuth antimony palladium rhodium iridium osmium lithium".split()
        ),
    ),
    Attribute(
        "language",
        ("The language that {s} uses is {v}.", "{s} uses one language, {v}."),
        ("What is the language that {s} uses?", "Which language does {s} use?"),
        "uses {v}",
        "Which languages do {s} use?",
        tuple(
            "Latin Greek Gothic Norse Frisian Saxon Breton Cornish Welsh Gaelic Manx Basque Catalan Provencal "
            "Tuscan Lombard Venetian Dalmatian Polish Czech Magyar Finnish Estonian Livonian".split()
        ),
    ),
    Attribute(
        "abbey",
        ("The abbey that {s} adorns is {v}.", "{s} adorns an abbey called {v}."),
        ("What is the abbey that {s} adorns?", "Which abbey does {s} adorn?"),
        "adorns {v}",
        "Which abbeys do {s} adorn?",
        _join("Clun Fon Mel Rie Tin Wal", "court rose tern sey"),
    ),
)

ATTRIBUTES = {"person": PERSON_ATTRIBUTES, "place": PLACE_ATTRIBUTES, "work": WORK_ATTRIBUTES}

# A bridge leads from a place or a work to a person, whose own document says more.
BRIDGES = {
    "place": Attribute(
        "warden",
        ("The warden who guards {s} is {v}.", "{s} has a warden called {v}."),
        ("Who is the warden who guards {s} today?", "Which warden does {s} have?"),
        "is guarded by {v}",
        "Which wardens do {s} have?",
        WOMEN + MEN,
    ),
    "work": Attribute(
        "guardian",
        ("The guardian who watches {s} is {v}.", "{s} has a guardian called {v}."),
        ("Who is the guardian who watches {s} today?", "Which guardian does {s} have?"),
        "is watched by {v}",
        "Which guardians do {s} have?",
        WOMEN + MEN,
    ),
}
