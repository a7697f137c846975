"""The words that may be shown of a free text: none of them tells who a patient is.

Free text of a hospital (names of ROIs and series, diagnoses) is let through by what is known, since what is bad in it
cannot be listed: names of people are words of any length in any language. The lists are those of English, German,
French, Spanish, Italian, Dutch and Portuguese, without accents (`folded`), as hospitals and public data sets write them
(TG-263 of the AAPM, TotalSegmentator, Pediatric-CT-SEG, PERCIST and Deauville; series of the vendors' scanners).
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache


def folded(word: str) -> frozenset[str]:
    """How a word may be spelled without accents and capitals: Läsion is laesion and lasion, Yıldız is yildiz."""
    word = unicodedata.normalize("NFC", word).upper().casefold()
    german = word.translate(str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"}))
    plain = word.translate(str.maketrans({"ø": "o", "ł": "l", "đ": "d"}))
    return frozenset("".join(filter(str.isalnum, unicodedata.normalize("NFKD", form))) for form in (german, plain))


def repaired(text: str) -> str:
    """A text whose UTF-8 was read as Latin-1, as a header without its character set is, read as it was meant."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _words(text: str) -> frozenset[str]:
    return frozenset(form for word in text.split() for form in folded(word))


LESION = _words(
    """
    lesion lesions lesional les läsion läsionen lésion lésions lesión lesiones lesione lesioni lesão lesões laesie
    laesies tumor tumors tumoral tumour tumours tumoren tumore tumori tumores tumeur tumeurs neoplasm neoplasia
    neoplasie neoplasma neubildung gtv gtvp gtvn gtvt gtvnd gtvs mtv tmtv wbmtv met mets metastasis metastases
    metastatic metastase metastasen metastatisch metastasi metástasis metástases uitzaaiing uitzaaiingen filia filiae
    ln lns lk lks lnn node nodes nodal lymphnode lymphnodes lymphknoten lymfeklier lymfeklieren ganglion ganglions
    ganglionnaire ganglionnaires ganglio ganglios gânglio gânglios linfonodo linfonodi linfonodos adenopathy
    adenopathies lymphadenopathy lymphadenopathie adénopathie adénopathies adenopatia adenopatías linfoadenopatia
    linfadenopatia nodule nodules nodulus noduli nódulo nódulos nodulo noeud noeuds knoten rundherd rundherde herd
    herde bulk bulky mass masses masse massen massa masa masas raumforderung raumforderungen cancer krebs carcinoma
    karzinom karzinome carcinome cáncer cancro carcinoom lymphoma lymphom lymphome linfoma lymfoom melanoma melanom
    mélanome sarcoma sarkom sarcome hcc nsclc sclc malignant malignancy maligne maligno primary primaries primarius
    primärtumor infiltrate infiltration infiltrat infiltrates befall rezidiv rezidive recurrence recurrent récidive
    recidiva recidivo deposit deposits tumorthrombus lokalrezidiv lokalrezidive tu resttumor restlymphom weichteiltumor
    involvement involved karzinose carcinomatosis carcinosis
    """
)
# Said with a lesion they deny it or take it away; then nobody can tell but who drew it
DENIAL = _words(
    """
    no not non negative without ohne kein keine minus excl excluding except sans sin senza sem zonder benign benigne
    benigno gutartig subtract subtracted nonmalignant nicht neg negativ free frei freie freies freien less exclude
    excluded exkludiert abzgl abzüglich uninvolved unaffected elective elektiv elektive reactive reaktiv reaktive
    reaktiver inflammatory inflammation entzündlich entzündliche entzündlicher degenerative degenerativ unspecific
    nonspecific unspezifisch unspezifische false incl including inkl inklusive containing margin margins exp expanded
    expansion shell rand peritumoral mirror mirrored box bbox bounding bed bett delete deleted
    """
)
REFERENCE = _words(
    """
    reference references referenz referenzen ref référence referencia riferimento referência referentie background bg
    bkg bgd bgr hintergrund fond fondo achtergrund bloodpool blood blut blutpool mbp bp pool sang sangre sangue bloed
    percist physiologic physiological physiologisch physiologische physiologique fisiologico fisiológico fysiologisch
    injection injektion injektionsstelle injectionsite paravasat paravasation extravasation extravasate normal healthy
    gesund gesunde mbps braunes braune sano sain sana control kontrolle artifact artifacts artefact artefacts artefakt
    artefakte noise rauschen brown bat urine urin orina catheter katheter port portkammer stent prosthesis prothese
    endoprothese implant implants implantat pacemaker schrittmacher bolus couch table tisch support helper hilfsstruktur
    """
)
ORGANS = _words(
    """
    external body skin outline contour surface air fat muscle muscles bones tissue soft softtissue face haut körper
    aussenkontur außenkontur kontur körperkontur patientenkontur luft fett muskel muskeln muskulatur weichteile
    gesicht corps peau contorno cuerpo corpo piel pelle pele huid lichaam graisse grasa grasso gordura vet músculo
    muscolo brain brainstem cerebrum cerebellum cerebellar cerebral spinal spinalcord cord canal cauda equina chiasm
    optic nerve nerves eye eyes eyeball globe lens lenses cochlea pituitary hippocampus hippocampi thalamus ventricles
    csf lacrimal hirn gehirn grosshirn hirnstamm kleinhirn rückenmark rückenmarkskanal myelon spinalkanal auge augen
    linse linsen sehnerv sehnerven chiasma hypophyse cerveau cervelet tronc cérébral moelle oeil yeux cristallin
    cerebro cerebelo encéfalo médula espinal ojo ojos cervello midollo spinale occhio occhi cérebro olho olhos
    hersenen ruggenmerg oog parotid parotids submandibular sublingual salivary gland glands thyroid parathyroid larynx
    pharynx oropharynx nasopharynx hypopharynx mandible maxilla oral cavity lip lips tongue palate teeth tooth tonsil
    tonsils glottis trachea airway airways oesophagus esophagus parotis ohrspeicheldrüse speicheldrüse speicheldrüsen
    schilddrüse drüse drüsen kehlkopf rachen zunge unterkiefer oberkiefer kiefer luftröhre speiseröhre ösophagus
    mundhöhle zähne zahn parotide parotides thyroïde glande glandes trachée oesophage langue tiroides tiroide glándula
    esófago tráquea lengua esofago ghiandola lingua faringe laringe tireoide traqueia speekselklier schildklier
    slokdarm luchtpijp heart cardiac myocardium myocardial pericardium atrium atrial ventricle ventricular aorta
    aortic lung lungs pulmonary bronchus bronchi bronchial lobe breast breasts nipple thymus diaphragm pleura vena
    cava ivc svc vein veins artery arteries portal splenic vessel vessels carotid subclavian brachiocephalic coronary
    herz herzmuskel myokard vorhof kammer lunge lungen lungenlappen lappen bronchien brust brüste mamma mammae aorten
    pfortader hohlvene vene venen arterie arterien gefäss gefässe zwerchfell coeur poumon poumons sein seins veine
    artère aorte ventricule corazón pulmón pulmones pulmonar mama mamas arteria cuore polmone polmoni seno ventricolo
    coração pulmão pulmões veia artéria hart long longen borst ader slagader liver hepatic spleen kidney kidneys renal
    adrenal adrenals adrenalgland suprarenal stomach pancreas gallbladder gall bile duct bowel bowels intestine
    intestines intestinal duodenum jejunum ileum small large colon sigmoid cecum caecum appendix rectum anus anal
    peritoneum omentum leber leberlappen milz niere nieren nebenniere nebennieren magen bauchspeicheldrüse pankreas
    galle gallenblase darm dünndarm dickdarm zwölffingerdarm enddarm mastdarm after foie rate rein reins surrénale
    surrénales estomac pancréas vésicule biliaire intestin intestins grêle côlon duodénum hígado bazo riñón riñones
    suprarrenal estómago vesícula biliar intestino intestinos delgado grueso recto fegato milza rene reni surrene
    surreni stomaco colecisti cistifellea tenue retto fígado baço rim rins estômago vesicula reto lever milt nier
    bijnier maag alvleesklier galblaas darmen bladder urinary urinarybladder urethra ureter ureters prostate seminal
    vesicle vesicles uterus utero cervix uteri uterine vagina vulva ovary ovaries ovarian testis testes testicle
    testicles gonad gonads penis bulb penilebulb scrotum placenta blase harnblase harnleiter harnröhre prostata
    samenblase samenblasen gebärmutter eierstock eierstöcke ovar ovarien hoden scheide keimdrüsen gonaden vessie
    urètre uretère ovaire ovaires testicule testicules vejiga próstata útero ovario ovarios testículo testículos
    vescica ovaia ovaie testicolo testicoli bexiga ovário ovários blaas baarmoeder eierstok zaadbal femur femora
    femurs femoral head heads hip hips humerus humeri humeral scapula scapulae clavicle clavicles clavicula claviculae
    sternum skull cranium rib ribs ribcage costal cartilage cartilages vertebra vertebrae vertebral spine spinous
    sacrum coccyx disc discs pelvicbone hipbone hipbones ilium ischium pubis acetabulum tibia fibula radius ulna
    patella carpal tarsal marrow bonemarrow gluteus maximus medius minimus iliopsoas psoas autochthon quadriceps
    oberschenkelkopf hüftkopf hüfte hüften oberarm schulterblatt schlüsselbein brustbein schädel schädelkalotte rippe
    rippen wirbel wirbelkörper wirbelsäule hws bws lws kreuzbein steissbein bandscheibe knochenmark hüftknochen fémur
    tête fémorale humérus omoplate clavicule crâne côte côtes vertèbre vertèbres colonne vertébrale rachis hanche
    cráneo costilla costillas vértebra vértebras columna cadera hueso huesos femore testa omero scapola clavicola
    cranio costa coste costola vertebre colonna vertebrale osso ossa anca cyst cysts zyste zysten kyste quiste cisti
    appendage appendages extremities subcutaneous intervertebral bronchia bronchiae bag hyoid brachialplexus plexus
    plex brachial prox buccal mucosa cartlg cornea retina cricoid cricopharyngeus pharyngeal constrictor constrictors
    arytenoid arytenoids genitals genitalia glnd submand submandib great ves cortex medulla frontal temporal parietal
    musc constrict nrv penile venacava vb carina spc spongiosum joint joints tm tmj temporomandibular lul lll rul rml
    rll trunc trunk extremity hypothalamus amygdala caudate putamen pallidum insula callosum corpus pelvicbones
    scapulas calvarium orbit orbits sinus sinuses maxillary ear ears hardpalate softpalate supraglottis subglottis
    circumflex skeletalmuscle visceral esophageal crânio costela costelas coluna ossos quadril schedel ribben wervel
    wervels wervelkolom heup botten dijbeen stem mandibula submandibularis brachialis rektum patientenaussenkontur
    """
)
# Of which there are many, told by their number: a number after another organ counts something in it
NUMBERED = _words(
    """
    rib ribs rippe rippen côte côtes costilla costillas costa coste costola costela vertebra vertebrae vertebral
    wirbel wirbelkörper vertèbre vertèbres vértebra vértebras vertebre wervel wervels disc discs bandscheibe spine
    wirbelsäule lobe lobes lappen costal cartilage cartilages cord spinal tooth teeth zahn zähne ribben
    """
)
# Where a lesion may lie, and what a reader of lymphoma may call a lesion by; alone they are neither
REGIONS = _words(
    """
    mediastinum mediastinal mediastinale médiastin médiastinal mediastino mediastinico hilum hilar hila hilus hiläre
    hilär hile axilla axillary axillar axillär axillaire axila ascella oksel inguinal inguinale groin leiste leisten
    inguen lies cervical zervikal cervicale neck hals cou cuello collo nek nuchal supraclavicular supraklavikulär
    infraclavicular infraklavikulär sus claviculaire supraclaviculaire sovraclaveare clavicular iliac iliacal iliakal
    iliaque iliaco mesenteric mesenterial mesenterium mesentery paraaortic paraaortal aortocaval interaortocaval
    retroperitoneal retroperitoneum retroperitoneale coeliac celiac paracardial subcarinal paratracheal infrahilar
    interlobar tracheal waldeyer bone bony osseous knochen ossär skelett skeletal skeleton os oseo osseux hueso chest
    thorax thoracic thorakal thoraxwand abdomen abdominal bauch pelvis pelvic becken pelvien torso trunk rumpf arm
    arms leg legs bein beine thigh thighs oberschenkel knee knie foot feet hand hands shoulder shoulders schulter
    elbow head kopf cabeza capo back rücken lumbar lumbal sacral sakral thoracolumbar presacral perirectal mesorectal
    obturator hepatogastric portocaval peripancreatic gastric hepatic retrocrural internal common level station levels
    segment seg pectoral pectoralis intramammary mammary parasternal epicardial cardiophrenic subpectoral popliteal
    occipital preauricular submental jugular jugulodigastric deep superficial apex apical base basal hemithorax flank
    wall chestwall sulcus lateral central region area zone site sites stelle dorsal rectal vesical nasal
    """
)
SIDES_AND_PARTS = _words(
    """
    left right lef rig l r lt rt li re links rechts linke rechte linker rechter linkes rechtes gauche droit droite
    izquierdo izquierda derecho derecha sinistra sinistro destra destro esquerda esquerdo direita direito linkerkant
    both bilateral beidseits bds upper lower middle mid outer asc superior inferior oben unten ober unter mittel
    anterior posterior medial proximal distal ant post sup inf obere untere oberer unterer ventral caudal kranial
    cranial kaudal dexter sinister ascendens descendens ascending descending arch total whole all small large big the of
    and und et y e de del des du la le di da der die das von im in am an bei near with mit organ organs oar mask maske
    roi rois voi vois vol volume volumen label labels segments segmentation segmentierung structure struktur copy kopie
    new neu old alt final auto manual manuell expert reader model prediction pred uptake aufnahme anreicherung suv
    suvmax i v ii iii iv nothing cut pet ct thr threshold isocontour contour percent fixed adaptive n p t a b c d
    number nr sphere sphäre kugel cube würfel main other others types type mm cm s index target first second third
    gross residual baseline followup
    """
)
IMAGING = _words(
    """
    pet ct pt mr mri nm rt rtstruct rtss seg suv suvbw bqml hu wb tb wholebody whole total body ganzkörper gk corps
    entier cuerpo entero totale lichaam torso ac nac ctac ctacwb acct atten attenuation corrected uncorrected
    correction corr uncorr korrigiert unkorrigiert corrigé corrigée schwächungskorrektur schwächungskorrigiert no not
    non with without ohne mit avec sans low dose lowdose ld ldct niedrigdosis diagnostic diagnostisch diag contrast
    contraste enhanced km ce native nativ venous portalvenous venös portalvenös arterial arteriell phase phases late
    early delayed delay spät früh static statisch dynamic dynamisch gated gating ungated respiratory breath breathhold
    free atem inspiration expiration insp exp inspir expir average mean axial coronal sagittal cor sag ax tra trans
    transaxial mpr mip vrt recon reconstruction rekonstruktion recons iterative osem fbp tof psf bpl truex ultrahd hd
    ultra vpfx vpfxs vpfxc vuepoint vue point fx sharpir clear qclear pd deep learning precision dl dlr allpass all
    pass gauss gaussian filter filtered matrix zoom kernel soft tissue softtissue lung bone standard stnd std stand
    detail sharp smooth medium thick thin slice slices slab safire admire asir asirv idose idr imr aidr fst karl
    biograph mct horizon vision quadra discovery omni legend gemini ingenuity vereos celesteion cartesion umi united
    imaging siemens ge philips toshiba canon series serie serien image images bild bilder study scan scans screen save
    screensave snapshot capture secondary topogram scout surview localizer localiser fused fusion fusionen report
    protocol patient anonymous anonymized dosereport result results summary data frame frames bed beds fov extended
    ext arms up down head neck thorax abdomen pelvis legs skull eyes thigh thighs base feet vertex brain kopf hals
    becken oberschenkel schädel bauch tête cou cabeza cuello testa baseline followup follow interim restaging staging
    therapy planning pretreatment posttreatment post pre nach vor acquisition acq raw original derived primary
    reformatted resampled registered reg transformed norm normalized normalised lean bsa bw lbm sul kbq mbq bq ml gml
    counts cps emission transmission tr trmap em mac mumap umap map water fat inphase opphase dixon haste stir flair
    vibe dwi adc tse tirm t1 t2 postcontrast min max avg sum add contours contour structures structure set rtplan
    rtdose plan annotation annotations lesions organs auto pi inj i nuclear medicine sequence wfov carewb wbac wbnac
    fdg psma dotatate dotatoc dotanoc fes naf flt fet fdopa dopa fapi choline methionine acetate fluciclovine
    fluoroestradiol fluorodeoxyglucose piflufolastat flotufolastat gozetotide dcfpyl rhpsma florbetapir florbetaben
    flutemetamol flortaucipir ammonia rubidium pentixafor fmiso tracer glucose fluorine gallium copper carbon
    zirconium iodine none x good best other half nachtrag addendum tracking start admin units missing cnts prop linear
    """
)  # fmt: skip
# Also in front of or behind others without a space (Lebermetastase, Blutpool, lymphnode), so of some letters at least
_COMPOUNDABLE = LESION | REFERENCE | ORGANS | REGIONS | {"links", "rechts", "left", "right", "total", "body", "para",
                                                         "inter", "supra", "infra", "peri", "retro", "sub", "lymph"}
_LEAST_PART = 3  # letters; shorter ones are found in many a name
HELPERS = _words("ptv ctv itv irv prv pctv isodose isodosen isodoses bolus avoid avoidance opti ring dose oedema edema "
                 "ödem ödeme gy cgy")  # fmt: skip
# Known words that are names of people as well: they tell what an ROI is, but are not shown
ALSO_NAMES = _words("costa coste jan mai rene reni hart long longen rein reins massa massen masse masa sano sain sana "
                    "capo vet rim big lies rosa seno sein seins tu free frei less rand bett stem box")  # fmt: skip
KNOWN = LESION | DENIAL | REFERENCE | ORGANS | REGIONS | SIDES_AND_PARTS | IMAGING | HELPERS | {"lymph"}


@lru_cache(maxsize=65536)
def known_parts(word: str) -> tuple[str, ...]:
    """The known words (folded) that a word without spaces is made of, one or two or three; () if it is none."""
    for form in sorted(folded(word)):
        if form in KNOWN:
            return (form,)
    for form in sorted(folded(word)):
        if found := _split(form, 3):
            return found
    return ()


def _split(form: str, most: int) -> tuple[str, ...]:
    if form in _COMPOUNDABLE and len(form) >= _LEAST_PART:
        return (form,)
    for end in range(len(form) - _LEAST_PART, _LEAST_PART - 1, -1) if most > 1 else ():
        if form[:end] in _COMPOUNDABLE and (rest := _split(form[end:], most - 1)):
            return (form[:end], *rest)
    return ()
