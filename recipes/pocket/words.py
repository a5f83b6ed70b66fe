"""Everyday English words for pre-training, written by hand for this recipe: nouns with their kinds, and words to read.

No kind is a class of a benchmark task. In a question, a noun always follows a determiner ("the dog"), so that no entry
of the emoji list (name and group) occurs literally. A test checks both.
"""

from __future__ import annotations

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(nouns.split())
    for kind, nouns in {
        "animals": (
            "dog cat horse cow pig sheep goat mouse rat rabbit fox wolf bear lion tiger monkey elephant camel deer zebra "
            "panda kitten puppy hound squirrel otter beaver bat bull ram frog toad turtle snake lizard crocodile dragon "
            "dinosaur paw gorilla"
        ),
        "birds": (
            "bird hen chicken rooster duck goose swan eagle owl parrot pigeon crow dove penguin peacock turkey sparrow "
            "robin feather chick"
        ),
        "sea animals": (
            "fish whale shark dolphin seal octopus squid crab lobster shrimp shell oyster snail jellyfish salmon tuna"
        ),
        "insects": ("ant bee fly beetle butterfly spider mosquito worm cricket ladybug caterpillar wasp moth bug"),
        "plants": (
            "tree leaf flower rose tulip grass bush pine oak cactus herb seed root branch blossom sunflower ivy fern clover "
            "mushroom"
        ),
        "fruit": (
            "apple pear peach cherry grape lemon orange lime melon banana mango strawberry berry plum pineapple coconut "
            "kiwi fig avocado"
        ),
        "vegetables": (
            "carrot potato tomato onion garlic corn pepper cucumber pumpkin broccoli cabbage bean pea lettuce eggplant spinach"
        ),
        "meals": (
            "bread cheese butter egg bacon burger pizza sandwich soup salad rice noodle pasta pie cake cookie chocolate "
            "candy sugar honey meat steak ham sausage pancake waffle donut popcorn taco dumpling stew curry bagel pretzel "
            "pudding toast snack"
        ),
        "drinks": ("water milk tea coffee juice beer wine cocktail soda lemonade cocoa champagne whisky beverage"),
        "vehicles": (
            "car bus truck train tram taxi bicycle scooter motorcycle boat ship ferry canoe plane airplane helicopter "
            "rocket tractor ambulance van wagon subway railway sailboat locomotive"
        ),
        "buildings": (
            "house home school hospital church castle tower hotel bank office factory shop store museum temple mosque "
            "station bridge stadium library barn cabin palace hut"
        ),
        "places": (
            "mountain volcano beach desert island park garden city town village road street forest river lake sea camp "
            "field harbor valley map globe world earth"
        ),
        "sky and weather": (
            "sun moon star comet cloud rain snow storm wind fog lightning thunder rainbow tornado hurricane sunrise sunset "
            "night ice"
        ),
        "clothes": (
            "shirt dress coat jacket trousers jeans skirt sock shoe boot sandal hat cap crown scarf glove belt tie glasses "
            "purse handbag backpack kimono swimsuit"
        ),
        "tools": (
            "hammer saw axe wrench screwdriver drill knife shovel rope ladder nail screw bolt chain gear brush broom bucket "
            "magnet pick clamp hook"
        ),
        "house things": (
            "chair table bed couch sofa lamp candle door window mirror bathtub shower toilet soap key lock clock watch vase "
            "sponge cup plate fork spoon pan bottle basket"
        ),
        "office things": (
            "book notebook paper pen pencil crayon ruler scissors envelope letter mail stamp folder calendar clip pin "
            "newspaper scroll card box package file"
        ),
        "machines": (
            "computer laptop keyboard printer phone telephone radio television camera battery bulb microscope telescope "
            "robot screen satellite antenna projector"
        ),
        "music": ("guitar violin piano drum flute trumpet harp saxophone banjo accordion song microphone headphone melody"),
        "sports": (
            "football soccer baseball basketball tennis golf hockey rugby boxing ski skate medal trophy bowling volleyball "
            "badminton archery surfing judo wrestling racket goal"
        ),
        "games and parties": (
            "dice puzzle kite chess balloon party gift present fireworks toy doll lantern circus ticket magic costume game "
            "yo-yo confetti"
        ),
        "people": (
            "man woman boy girl baby child person adult father mother brother sister family couple grandmother grandfather "
            "friend bride groom king queen prince princess wizard witch fairy mermaid elf zombie vampire clown"
        ),
        "jobs": (
            "doctor nurse teacher farmer cook pilot judge student artist singer police guard detective firefighter mechanic "
            "scientist sailor astronaut worker soldier baker"
        ),
        "body parts": (
            "hand foot leg arm finger thumb nose ear eye mouth tongue tooth hair beard knee brain bone lung fist palm face "
            "elbow"
        ),
        "gestures": ("wave clap bow shrug nod handshake salute point pray kick walk run dance jump swim climb"),
        "feelings": (
            "joy anger fear sadness love surprise smile grin laugh cry tear kiss wink frown worry sleepy angry happy sad "
            "confused tired scared disappointed hug"
        ),
        "signs": (
            "arrow triangle square circle cross diamond number digit plus minus question exclamation percent infinity "
            "recycling warning button mark dot exit sign"
        ),
        "countries": (
            "france germany spain italy japan china india brazil canada mexico russia egypt kenya nigeria norway sweden "
            "denmark poland greece turkey iran iraq israel peru chile cuba ghana mali niger chad togo ireland iceland "
            "finland austria hungary ukraine romania portugal belgium nepal vietnam thailand korea australia argentina "
            "colombia jamaica morocco"
        ),
        "islands": ("malta cyprus fiji samoa tonga bermuda aruba guam jersey barbados bahamas mauritius seychelles maldives"),
        "money": ("coin dollar euro pound yen bill wallet credit cash"),
        "weapons": ("sword dagger gun bomb shield cannon spear"),
        "medicine": ("pill syringe bandage stethoscope blood vaccine thermometer"),
    }.items()
}
"""Kind → nouns. "turkey" is both a bird and a country; no question offers both kinds."""

DETERMINERS = ("the", "my", "our", "your", "that", "this")
"""One of these precedes each noun in a question."""

READABLE = (
    "stop go left right open shut hot cold north south east west day night rain snow fire water help exit push pull up down "
    "in out on off yes no map bus milk salt tea ten safe risk blood lung bone skin scan news flood storm red blue green "
    "black white pink gray brown one two three four five six big small old new good bad happy sad love hate fun joke meme "
    "cute ugly rich poor fast slow high low soft hard wet dry dark light warm cool first last free full empty dog cow pig "
    "hen fox wolf lion duck owl bee ant frog bat rose bread cake pie rice egg soup beer wine man boy girl king queen baby "
    "nose ear arm leg foot road city park shop bank farm lake sea hill wind ice gold coin pen box bag cup bed door desk "
    "tool nail rope song drum ball game win lose play run walk jump swim sing eat drink sleep work read talk time week year "
    "now here there who why how what when true false not and the house tree car boat fish bird cat bear face hand eye "
    "flower leaf sun moon cloud apple key book clock lamp gift hat shirt bell flag arrow heart ring gear rocket train star "
    "circle cross"
).split()
"""Words written in generated pictures, of two to seven letters."""
