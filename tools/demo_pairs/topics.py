"""The bank of topics: what the demo's answers say.

Each block is a topic's name over six short true clauses, two a line. The clauses of the first line
name the topic, so that an answer can open with either; the other four may follow in any order.
Clauses hold no commas or full stops and start in lower case unless with a proper noun.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """A topic's name, the clauses that may open an answer, and those that may follow."""

    name: str
    openers: tuple[str, ...]
    followers: tuple[str, ...]


def read_topics(bank: str) -> list[Topic]:
    """Reads blocks that are separated by empty lines."""
    topics = []
    for block in bank.strip().split("\n\n"):
        name, first, *rest = block.splitlines()
        followers = tuple(clause for line in rest for clause in line.split(" | "))
        topics.append(Topic(name, tuple(first.split(" | ")), followers))
    return topics


TOPICS = read_topics("""
honey bees
honey bees live together in large colonies | honey bees visit flowers to gather nectar
one queen lays nearly all of the eggs | workers dance to show others where food is
the wax comb stores both honey and pollen | the colony survives winter by huddling together

sourdough bread
sourdough bread rises with the help of wild yeast | sourdough bread owes its tang to natural acids
a healthy starter needs regular feeding with flour | the dough often ferments for many hours
a very hot oven gives a crisp crust | the loaf should cool before it is sliced

thunderstorms
thunderstorms form when warm moist air rises quickly | thunderstorms can bring hail and strong wind
a bolt of lightning is hotter than the surface of the sun | a sturdy building is the safest shelter
thunder is the sound of air expanding suddenly | the flash reaches us long before the sound does

the violin
the violin has four strings tuned in fifths | the violin took its modern form in Italy
players draw a horsehair bow across the strings | the wooden body makes the sound much louder
rosin helps the bow grip the strings | the left hand sets the pitch of each note

the moon
the moon circles Earth about once a month | the moon always shows us nearly the same face
lunar gravity is the main cause of ocean tides | the surface is covered with dust and craters
astronauts first walked on the surface in 1969 | moonlight is really sunlight reflected toward us

bicycles
bicycles turn leg power into forward motion | bicycles are among the most efficient vehicles
low gears make it easier to climb hills | most brakes squeeze the rim or a metal disc
tires need the right pressure to roll well | a helmet protects the head in a fall

ancient Egypt
ancient Egypt grew up along the Nile River | ancient Egypt lasted for roughly three thousand years
yearly floods left rich soil for farming | scribes wrote with picture signs called hieroglyphs
the great pyramids were built as royal tombs | papyrus reeds were made into writing sheets

sleep
sleep gives the body time to repair itself | sleep supports both memory and mood
most adults need at least seven hours a night | a dark quiet room makes rest easier
bright screens at night can delay drowsiness | caffeine can stay active for many hours

elephants
elephants are the largest animals living on land | elephants live in close families led by females
a trunk can lift a log or pick up a nut | big ears help the body release heat
calves drink milk for several years | tusks are actually very long teeth

green tea
green tea comes from the same plant as black tea | green tea is made from unoxidized leaves
boiling water can make the taste too bitter | two or three minutes of steeping is often enough
each cup holds a moderate amount of caffeine | most of the supply comes from China

rainbows
rainbows appear when sunlight meets drops of water | rainbows run from red through green to violet
each drop acts like a tiny prism | the sun must be behind the viewer
a second fainter arc sometimes appears outside | an air passenger may even see a full circle

hammers
hammers are mostly used to drive nails into wood | hammers strike hard because of their heavy heads
a curved claw can pull out bent nails | a longer handle gives each swing more force
safety glasses protect the eyes from chips | a rubber mallet strikes without leaving marks

chess
chess is played on a board of sixty-four squares | chess began in India many centuries ago
each player starts with sixteen pieces | the queen is the most powerful piece
checkmate ends the game at once | a pawn can be promoted on the far side

volcanoes
volcanoes are openings where molten rock escapes | volcanoes often form where plates of crust meet
melted rock below ground is called magma | ash clouds can ground aircraft far away
old lava breaks down into fertile soil | many eruptions begin with small earthquakes

soccer
soccer is played by two teams of eleven | soccer is the most popular sport in the world
only goalkeepers may catch the ball during play | a full match lasts ninety minutes
a red card sends a player off the field | the World Cup takes place every four years

Venice
Venice is built on more than one hundred islands | Venice uses canals where other cities use streets
gondolas carry visitors along the narrow waterways | hundreds of bridges link the neighborhoods
high tides sometimes flood the main square | glass has long been made on nearby Murano

cats
cats sleep for much of the day | cats are quiet hunters with sharp claws
whiskers help to judge the width of gaps | purring is often a sign of comfort
a rough tongue works like a comb | kittens learn by playing with one another

omelettes
omelettes are made from beaten eggs | omelettes take only a few minutes to cook
gentle heat keeps the eggs tender | cheese or herbs make a simple filling
a nonstick pan makes folding much easier | a pinch of salt brings out the flavor

snow
snow forms from ice crystals inside cold clouds | snow covers much of the far north each winter
most flakes have six sides or six arms | fresh powder absorbs much of the sound around it
a white surface reflects a lot of sunlight | melting drifts feed the rivers in spring

the piano
the piano usually has eighty-eight keys | the piano was invented in Italy around 1700
small felt hammers strike the metal strings | pedals can hold notes or soften the sound
both hands can play different lines at once | a skilled tuner keeps the strings in pitch

Mars
Mars is the fourth planet from the sun | Mars looks red because of rusty iron in its soil
a day there lasts slightly longer than ours | two small moons circle the planet
robot rovers have explored the dusty surface | the largest volcano there is called Olympus Mons

umbrellas
umbrellas keep people dry in the rain | umbrellas fold up so that they are easy to carry
thin metal ribs hold the fabric open | strong wind can turn the cover inside out
ancient versions gave shade from the sun | bright colors make walkers easier to see

the Roman Empire
the Roman Empire once ringed the Mediterranean Sea | the Roman Empire began under Augustus
straight paved roads linked distant provinces | stone aqueducts carried fresh water into cities
Latin shaped many of the languages of Europe | Rome itself may have held a million people

drinking water
drinking water keeps the body working well | drinking water replaces what is lost through sweat
thirst is a useful guide for most people | hot weather raises the amount we need
juicy fruit also provides some fluid | a plain glass contains no sugar or calories

penguins
penguins are birds that swim instead of flying | penguins live mostly in the southern hemisphere
dense feathers keep out the cold water | emperor fathers balance the egg on their feet
small fish make up many meals | a layer of fat helps to hold in heat

pasta
pasta is usually made from wheat flour and water | pasta comes in hundreds of different shapes
salt in the boiling water improves the flavor | a little cooking water helps the sauce cling
fresh sheets cook faster than dried ones | ridged shapes hold thick sauces well

hurricanes
hurricanes draw their energy from warm ocean water | hurricanes spin around a calm eye
the strongest winds blow in the eye wall | satellites track each storm from space
a storm surge can flood the coast | most storms weaken quickly over land

screwdrivers
screwdrivers drive screws into wood or metal | screwdrivers come with many different tips
a tip that fits well prevents slipping | magnetic tips hold small screws in place
turning clockwise usually tightens a screw | a thick handle makes turning easier

tennis
tennis is played with rackets on a marked court | tennis can be played by two or four people
each point begins with a serve | clay courts slow the ball down
a score of zero is called love | Wimbledon is still played on grass

coral reefs
coral reefs are built by tiny soft animals | coral reefs shelter about a quarter of ocean species
most reefs grow in warm shallow water | algae inside the coral provide much of its food
heat stress can turn the coral white | healthy reefs protect beaches from heavy waves

the guitar
the guitar usually has six strings | the guitar suits many styles of music
metal frets mark the place of each note | a hollow body makes acoustic strings louder
chords sound several notes at the same time | fingertips grow tougher with regular practice

Tokyo
Tokyo is the capital of Japan | Tokyo was called Edo until 1868
trains carry millions of passengers every day | cherry trees bloom there in early spring
tall towers stand close to quiet shrines | Mount Fuji can be seen on clear days

owls
owls mostly hunt at dusk or at night | owls can turn their heads very far around
soft feather edges make flight almost silent | sharp hearing finds prey in the dark
large eyes gather even faint light | undigested bones come back up as pellets

rice
rice feeds about half of the world | rice is often grown in flooded fields
rinsing the grains removes loose starch | brown grains keep their outer layer of bran
a tight lid traps steam during cooking | short grains tend to be stickier

fog
fog is a cloud that touches the ground | fog forms when damp air cools near the surface
tiny drops of water scatter the light | drivers need low beams and a slower speed
morning sun usually clears the view | cool sea air often carries it ashore

the printing press
the printing press spread through Europe after 1450 | the printing press made books far cheaper
Johannes Gutenberg cast metal letters in Germany | type could be rearranged for each new page
ideas traveled much faster than before | reading slowly became a common skill

swimming
swimming exercises nearly every major muscle | swimming is gentle on the joints
steady breathing makes each stroke easier | freestyle is usually the fastest stroke
goggles protect the eyes from pool water | beginners should stay close to a lifeguard

black holes
black holes pull so hard that light cannot escape | black holes can form when massive stars collapse
the boundary is called the event horizon | hot gas glows brightly before falling in
a giant one sits at the center of our galaxy | the first image of one came out in 2019

pencils
pencils leave marks made of graphite and clay | pencils can write upside down or under water
softer cores make darker lines | many wooden cases are made of cedar
an eraser lifts the marks from paper | flat sides prevent rolling on a desk

walking
walking is a simple form of exercise | walking needs little more than comfortable shoes
a brisk pace raises the heart rate | short trips on foot add up over a week
fresh air can lift a low mood | good posture makes long distances easier

whales
whales are mammals that breathe air | whales feed their young with milk
the blue whale is the largest animal known | humpback males sing long complex songs
thick blubber keeps out the cold | some species filter tiny prey through baleen

chocolate
chocolate is made from roasted cacao beans | chocolate melts just below body temperature
dark bars contain more cocoa than milk bars | the Maya enjoyed cacao as a drink
sugar softens the natural bitterness | cocoa can be poisonous to dogs

earthquakes
earthquakes happen when rock slips along a fault | earthquakes send waves through the ground
sensitive instruments record each tremor | a large quake may trigger a tsunami
smaller aftershocks often follow the main shock | flexible buildings resist the shaking best

ladders
ladders help people reach high places | ladders should stand on firm level ground
three points of contact keep climbers steady | metal rails are dangerous near power lines
a helper can hold the base still | the top rungs are not meant for standing

basketball
basketball was invented by James Naismith in 1891 | basketball is played by two teams of five
the hoop hangs ten feet above the floor | long shots can be worth three points
players must dribble to move with the ball | a shot clock keeps the game fast

deserts
deserts receive very little rain each year | deserts can be hot or bitterly cold
cactus stems store water for dry months | clear skies let heat escape at night
many animals rest underground during the day | Antarctica is the largest one on Earth

drums
drums make a sound when a tight skin vibrates | drums are among the oldest instruments known
a tighter head gives a higher pitch | sticks or bare hands can set the beat
a full kit needs both hands and feet | ear protection is wise during loud practice

Iceland
Iceland lies just south of the Arctic Circle | Iceland has many active volcanoes
underground hot water heats most homes | glaciers cover about a tenth of the land
summer nights stay bright for weeks | most people live near the capital Reykjavik

octopuses
octopuses have eight arms and three hearts | octopuses change color to hide from danger
blue blood carries oxygen through the body | a soft body can squeeze through tiny gaps
dark ink confuses hungry predators | suckers can taste whatever they touch

tomatoes
tomatoes are fruits in the botanical sense | tomatoes first grew wild in South America
plenty of sun makes the flavor sweeter | tall vines need stakes for support
slow cooking turns the pulp into rich sauce | a cold fridge dulls the taste

tides
tides are the regular rise and fall of the sea | tides follow the pull of the moon and the sun
most coasts see two high waters each day | the widest range comes near a full or new moon
shore pools shelter crabs at low water | sailors check printed tables before leaving port

mirrors
mirrors reflect light in a regular way | mirrors are usually glass with a metal coating
a curved surface can enlarge the image | polished bronze served the same purpose long ago
big telescopes use them to gather starlight | drivers depend on them to see behind

clocks
clocks measure the passing of time | clocks once relied on swinging pendulums
gears turn the hands at different speeds | quartz crystals vibrate at a steady rate
atomic models stay accurate for millions of years | early sundials worked only in daylight

the Great Wall of China
the Great Wall of China spans thousands of miles | the Great Wall of China took centuries to build
watchtowers let soldiers send smoke signals | much of what remains dates from the Ming dynasty
packed earth was a common building material | visitors often walk the sections near Beijing

houseplants
houseplants bring some green into a room | houseplants often die from too much water
bright indirect light suits most kinds | drainage holes keep the roots from rotting
yellow leaves can be a warning sign | a larger pot gives the roots space to grow

brushing your teeth
brushing your teeth removes sticky plaque | brushing your teeth twice a day helps prevent decay
two minutes is a good length of time | soft bristles are kind to the gums
fluoride paste strengthens the enamel | floss reaches places that bristles miss

butterflies
butterflies begin life as caterpillars | butterflies taste with sensors on their feet
tiny scales give the wings their color | monarchs fly thousands of miles to warmer places
a chrysalis protects the changing body | a long tongue sips nectar from flowers

coffee
coffee is brewed from the roasted seeds of a fruit | coffee grows best in warm highland regions
finer grounds release flavor more quickly | water just below boiling works well
caffeine makes many people feel alert | Brazil is the largest producer of the beans

solar eclipses
solar eclipses happen when the moon covers the sun | solar eclipses can only occur at new moon
special glasses protect the eyes from damage | total darkness lasts a few minutes at most
birds may fall silent as the light fades | the shadow races across the ground

public libraries
public libraries lend books at no cost | public libraries offer a quiet place to study
the staff can help visitors find good sources | many branches lend films and games too
children often enjoy story hours there | a simple card opens the whole collection

yoga
yoga joins movement with steady breathing | yoga began in ancient India
slow stretches improve balance over time | a thin mat keeps the feet from slipping
beginners can use blocks for support | sessions often end with a quiet rest

the Amazon rainforest
the Amazon rainforest covers much of northern Brazil | the Amazon rainforest is home to many peoples
tall trees form a thick shady canopy | countless insects live among the leaves
heavy rain falls through much of the year | clearing land for cattle is a major threat

kites
kites fly because moving air lifts them | kites were probably first flown in China
a long tail can steady the flight | the string has to be kept tight
open beaches often have steady wind | nearby power lines are a serious danger

the compass
the compass shows which way is north | the compass was invented in China
a magnetized needle turns toward magnetic north | nearby iron can upset the reading
sailors relied on it under cloudy skies | hikers often pair it with a paper map
""")
